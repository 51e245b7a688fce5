"""MATLAB's bicubic imresize and its compiled kernel. Needs numpy alone."""
