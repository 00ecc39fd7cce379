"""Training: fitting labels, fine-tuning, and matching another network's outputs, by one loop.

fit           arrays and labels; trains the networks of the examples
finetune      ``finetune``: a network and labelled batches
distill       ``distill``: a student and a teacher, with labels or without

The loop
    options       how, and how long: the options that all training shares, optimizers and schedules
    loop          steps, epochs, the clock
    resume        checkpoints, from which an interrupted training continues exactly

A student and its teacher
    loss          the distillation loss: outputs, labels, and layers inside both networks
    batches       batches as they come, or samples of all of them, shuffled and mixed

Pruning while training
    moving_masks  gradual pruning and dynamic network surgery, as steps of the loop
"""
