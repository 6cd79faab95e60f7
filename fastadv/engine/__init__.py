"""The attack engine: it computes logits and input gradients, by the live model or a faster copy."""
