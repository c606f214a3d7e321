"""What leaves for the Hub: model, card, curves, ONNX. Read `upload.py`, then `model_card.py`."""
