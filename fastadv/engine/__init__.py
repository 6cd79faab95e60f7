"""How logits and input gradients are computed: the live model, or a faster copy of it."""
