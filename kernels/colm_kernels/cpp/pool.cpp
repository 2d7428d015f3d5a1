#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

// How long a thread looks for what it waits for before it sleeps. The operations of a layer follow each other within
// microseconds, and waking a sleeper takes tens of them, in which a few rows would have read a megabyte of weights.
constexpr std::chrono::microseconds kAwake{50};

// Look until `is_there` or the time is over; whether it is there.
template <class Test>
bool look_for(Test is_there) {
    constexpr int kLooks = 16;  // between two looks at the clock
    for (const auto end = std::chrono::steady_clock::now() + kAwake; std::chrono::steady_clock::now() < end;) {
        for (int i = 0; i < kLooks; ++i) {
            if (is_there()) return true;
            __builtin_ia32_pause();
        }
    }
    return is_there();
}

struct Job {
    Job(void (*run)(void*, int64_t), void* context, int64_t num_items)
        : run(run), context(context), num_items(num_items) {}

    void (*const run)(void*, int64_t);
    void* const context;
    const int64_t num_items;
    std::atomic<int64_t> next{0};
    // Workers inside work(). It grows under the pool's mutex; the job may be gone as soon as it is 0 again.
    std::atomic<int> num_helpers{0};

    void work() {
        for (int64_t item; (item = next.fetch_add(1)) < num_items;) run(context, item);
    }
};

class Pool {
  public:
    void run(Job& job, int num_helpers) {
        {
            std::lock_guard lock(mutex_);
            // A call may ask for helpers while all workers serve another; each waiting call gets its own.
            while (num_idle_ < static_cast<int>(tickets_.size()) + num_helpers && num_workers_ < kMaxWorkers) {
                try {
                    std::thread([this] { serve(); }).detach();
                } catch (const std::system_error&) {
                    break;  // no more threads are available; the caller does the work
                }
                ++num_workers_;
                ++num_idle_;
            }
            for (int i = 0; i < num_helpers; ++i) tickets_.push_back(&job);
        }
        // After the mutex is free: who is awake takes it at once, and would sleep if it were not.
        num_posts_.fetch_add(1);
        num_helpers == 1 ? wake_.notify_one() : wake_.notify_all();
        job.work();
        {
            std::lock_guard lock(mutex_);
            tickets_.erase(std::remove(tickets_.begin(), tickets_.end(), &job), tickets_.end());
        }
        const auto is_alone = [&] { return job.num_helpers.load() == 0; };
        if (look_for(is_alone)) return;
        std::unique_lock lock(mutex_);
        ++num_waiting_;
        left_.wait(lock, is_alone);
        --num_waiting_;
    }

  private:
    static constexpr int kMaxWorkers = 1024;

    void serve() {
        for (int64_t seen = num_posts_.load();;) {
            look_for([&] { return num_posts_.load() != seen; });
            std::unique_lock lock(mutex_);
            wake_.wait(lock, [&] { return !tickets_.empty(); });
            seen = num_posts_.load();
            Job* job = tickets_.front();
            tickets_.pop_front();
            --num_idle_;
            job->num_helpers.fetch_add(1);
            lock.unlock();
            job->work();
            ++num_idle_;
            // A caller that begins to wait now either sees the 0, or is seen to wait.
            if (job->num_helpers.fetch_sub(1) == 1 && num_waiting_.load() > 0) {
                lock.lock();
                left_.notify_all();
            }
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, left_;
    std::deque<Job*> tickets_;
    int num_workers_ = 0;
    std::atomic<int> num_idle_{0}, num_waiting_{0};
    std::atomic<int64_t> num_posts_{0};
};

// Never destroyed: workers may sleep in it until the process ends. A forked child has no workers, so it starts anew.
Pool& pool() {
    static std::mutex mutex;
    static Pool* current = nullptr;
    static pid_t owner = 0;
    std::lock_guard lock(mutex);
    if (current == nullptr || owner != getpid()) {
        current = new Pool;
        owner = getpid();
    }
    return *current;
}

}  // namespace

void run_items(int64_t num_items, int num_threads, void (*run)(void*, int64_t), void* context) {
    const int64_t useful = std::min<int64_t>(num_items, num_threads);
    Job job(run, context, num_items);
    if (useful <= 1) {
        job.work();
    } else {
        pool().run(job, static_cast<int>(useful - 1));
    }
}
