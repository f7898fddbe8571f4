"""The one harness for measuring: times by turns, memory, the machine, tables; and the layers measured with it."""
