"""Fashion-MNIST from end to end: a convolutional teacher, a small MLP student."""
