"""The user interface: one YAML per choice, composed by Hydra. Only entry points import it."""
