"""The paper: which target a cell has at which epoch (`ckf`), and the losses."""
