#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

struct Job {
    Job(void (*run)(void*, int64_t), void* context, int64_t num_items)
        : run(run), context(context), num_items(num_items) {}

    void (*const run)(void*, int64_t);
    void* const context;
    const int64_t num_items;
    std::atomic<int64_t> next{0};
    // Guarded by the pool's mutex.
    int num_helpers = 0;  // workers inside work()
    std::condition_variable helpers_left;

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
        num_helpers == 1 ? wake_.notify_one() : wake_.notify_all();
        job.work();
        std::unique_lock lock(mutex_);
        tickets_.erase(std::remove(tickets_.begin(), tickets_.end(), &job), tickets_.end());
        job.helpers_left.wait(lock, [&] { return job.num_helpers == 0; });
    }

  private:
    static constexpr int kMaxWorkers = 1024;

    void serve() {
        std::unique_lock lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return !tickets_.empty(); });
            Job* job = tickets_.front();
            tickets_.pop_front();
            --num_idle_;
            ++job->num_helpers;
            lock.unlock();
            job->work();
            lock.lock();
            ++num_idle_;
            if (--job->num_helpers == 0) job->helpers_left.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<Job*> tickets_;
    int num_workers_ = 0, num_idle_ = 0;
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
