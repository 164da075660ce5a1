"""What the machine gives this process: cores, threads of arithmetic. No torch is loaded by importing it."""
