"""The network: a timm classifier with class activation maps. Read `timm_cam.py`, then `cam.py`, then
`saving.py`; `forward.py` runs it over a dataset."""
