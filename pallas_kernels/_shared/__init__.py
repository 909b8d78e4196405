"""What the kernels of every platform need: the machine they are traced for, their record, gradients, meshes, refs."""
