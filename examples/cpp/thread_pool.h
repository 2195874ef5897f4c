// Threads of one's own, lent to the kernels.
#pragma once

#include <transmla/types.h>

#include <algorithm>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <queue>
#include <thread>
#include <vector>

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads) {
    for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this] { work(); });
  }

  ~ThreadPool() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // The threads and the one that calls a kernel, which works too.
  int size() const { return static_cast<int>(threads_.size()) + 1; }

  transmla::ParallelFor parallel_for() { return {&ThreadPool::run, this, size()}; }

 private:
  using index_t = transmla::index_t;

  static void run(void* pool, index_t begin, index_t end, index_t grain,
                  transmla::ParallelFor::Body body, void* context) {
    auto& self = *static_cast<ThreadPool*>(pool);
    const index_t chunk = std::max(grain, (end - begin + self.size() - 1) / self.size());
    const index_t own_end = std::min(begin + chunk, end);
    std::unique_lock lock(self.mutex_);
    for (index_t i = own_end; i < end; i += chunk) {
      self.jobs_.push([=] { body(context, i, std::min(i + chunk, end)); });
      ++self.num_unfinished_;
    }
    lock.unlock();
    self.wake_.notify_all();
    if (begin < own_end) body(context, begin, own_end);
    lock.lock();
    self.done_.wait(lock, [&] { return self.num_unfinished_ == 0; });
  }

  void work() {
    std::unique_lock lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      if (stopping_) return;
      const std::function<void()> job = std::move(jobs_.front());
      jobs_.pop();
      lock.unlock();
      job();
      lock.lock();
      if (--num_unfinished_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::queue<std::function<void()>> jobs_;
  int num_unfinished_ = 0;  // jobs, the caller's own chunk not counted
  bool stopping_ = false;
};
