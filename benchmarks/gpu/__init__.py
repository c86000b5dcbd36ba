"""What is measured on an NVIDIA GPU: accuracy after a short fine-tune, then speed, in the minutes that a borrowed one has."""
