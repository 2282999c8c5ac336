"""What happens beside training: samples, exports, throughput, logs."""
