"""The ``vit_ti`` weights that patchslim tries and tests itself with: ten digits on photographs. Holds files, no code.

``vit_ti_digits.safetensors`` are the weights, of timm's ``vit_tiny_patch16_224``; ``vit_ti_digits.json`` says how they were
trained and how well they do on held-out images.
"""
