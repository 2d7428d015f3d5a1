// Threads that run the items of a call. They are made on first need, and sleep when calls pause.
#pragma once
#include <cstdint>

// Run items 0 .. num_items - 1 on at most num_threads threads, the caller among them; returns when all have ended.
// Items start in order. Any number of threads may call at once.
void run_items(int64_t num_items, int num_threads, void (*run)(void* context, int64_t item), void* context);
