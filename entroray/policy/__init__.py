"""The language model: builder, chat template, exact token statistics, micro-batch layout."""
