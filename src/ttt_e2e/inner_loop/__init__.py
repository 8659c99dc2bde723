"""The method: the inner step, the loss through it, and its gradients."""
