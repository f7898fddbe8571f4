"""ImageNet's statistics: mean and standard deviation are of pixels in [0, 255]."""

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

# Principal components of the colours in [0, 1], as fb.resnet.torch has them: the eigenvalues of their covariance, and
# the three eigenvectors, of which each row has the entries for red, green or blue
COLOR_EIGENVALUES = (0.2175, 0.0188, 0.0045)
COLOR_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
