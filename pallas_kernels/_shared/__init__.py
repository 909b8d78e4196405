"""What the kernels of every platform need: the machine they are traced for, the record of a kernel and its table."""
