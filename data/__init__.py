"""The bottom layer: what a trace, a model's MoE and a prompt are, and where they come from."""
