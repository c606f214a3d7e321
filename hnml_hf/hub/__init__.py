"""What leaves for the Hub: model, card, curves, ONNX."""
