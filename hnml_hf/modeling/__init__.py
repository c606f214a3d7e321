"""The network: a timm classifier with class activation maps."""
