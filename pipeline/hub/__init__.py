"""What is put on the Hugging Face hub: the files of a run or a cache, their cards, and the push itself."""
