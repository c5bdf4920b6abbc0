import toolkit  # noqa: F401  # before ONNX Runtime, which tells nobody of its sessions then
