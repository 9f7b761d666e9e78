"""A trained model of head dim 128 with large key biases, made from SmolLM2 by widening its heads and distilling it into them."""
