"""Export of students to ONNX, torch.export and int8."""
