"""The network: a timm classifier with class activation maps. Read `timm_cam.py`, then `cam.py`, then `saving.py`."""
