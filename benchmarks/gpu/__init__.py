"""What runs on one machine with GPUs: checks of kernels and servers, and their times."""
