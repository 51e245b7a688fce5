"""MATLAB's bicubic imresize and its compiled kernel. Depends on numpy only."""
