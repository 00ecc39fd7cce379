"""Training: fitting labels, training on, and matching another network's outputs, by one loop.

fit          arrays and labels; what the examples' networks are made with
finetune     ``finetune``: a network and labelled batches
distill      ``distill``: a student and a teacher, with labels or without

The loop
    options      how, and how long: the options that everything shares
    loop         steps, epochs, the clock
    optimizers   optimizers and schedules, by name or of one's own
    resume       checkpoints, from which a training goes on as though it had not stopped

A student and its teacher
    goal         what the two are compared in
    features     layers inside both, brought together
    lessons      batches as they come, or samples of all of them, shuffled and mixed
    teaching     the training itself, and the teacher's answers where they are kept
"""
