"""Training: fitting labels, fine-tuning, and matching another network's outputs, by one loop.

fit           arrays and labels; trains the networks of the examples
finetune      ``finetune``: a network and labelled batches
distill       ``distill``: a student and a teacher, with labels or without

The loop
    options       how, and how long: the options that all training shares
    loop          steps, epochs, the clock
    optimizers    optimizers and schedules, by name or the user's own
    resume        checkpoints, from which an interrupted training continues exactly

A student and its teacher
    loss          the distillation loss
    features      layers inside both networks, and maps between their channels
    batches       batches as they come, or samples of all of them, shuffled and mixed
    teacher       the training itself, and the teacher's outputs where they are cached

Pruning while training
    moving_masks  gradual pruning and dynamic network surgery, as steps of the loop
"""
