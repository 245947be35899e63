"""Safe guidance: algorithms over three seams of a denoiser (text, attention, prediction). Tensors in, tensors out."""
