"""The network: ResNet encoders named as in torchvision, projector, multi-crop forward, EMA copy."""
