"""Image teachers: backbones, classifiers, and loading them."""
