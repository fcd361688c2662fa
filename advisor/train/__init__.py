"""The torch side that the training programs share: data, model, tuners, callbacks, checkpoints."""
