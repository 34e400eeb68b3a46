"""ONNX graphs of models, written from their config and tensor headers; weights follow, streamed into one file."""
