"""What the engine is timed against: guided sampling as users of diffusers and the relatives of ACS write it.

E: diffusers' transformer, eager, frozen, CFG on all channels, autograd guidance on x0 (`guided_steps`).
E-plain: the same operators in plain PyTorch, for machines without diffusers (`PlainTransformer`).
C: E with the transformer compiled by `torch.compile`.
P: batch 1, fp32 with TF32, guidance through the VAE's decode (`guided_steps` with a `decode`).
These are frozen: a faster engine leaves them as they are.
"""
