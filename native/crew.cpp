#include "crew.hpp"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace twofold {

namespace {

int64_t process() {
#if defined(__unix__) || defined(__APPLE__)
    return getpid();
#else
    return 0;
#endif
}

class Crew {
   public:
    std::mutex in_use;
    const int64_t owner = process();

    void run(int64_t count, int threads, const std::function<void(int64_t)>& work) {
        {
            std::lock_guard lock(mutex_);
            while (static_cast<int>(members_.size()) < threads - 1) members_.emplace_back(&Crew::serve, this, static_cast<int>(members_.size()));
            work_ = &work, count_ = count, wanted_ = threads - 1, busy_ = threads - 1;
            next_.store(0, std::memory_order_relaxed);
            ++round_;
        }
        begun_.notify_all();
        take_all(work, count);
        std::unique_lock lock(mutex_);
        ended_.wait(lock, [&] { return busy_ == 0; });
    }

   private:
    std::mutex mutex_;
    std::condition_variable begun_, ended_;
    std::vector<std::thread> members_;
    std::atomic<int64_t> next_{0};
    const std::function<void(int64_t)>* work_ = nullptr;
    int64_t count_ = 0;
    uint64_t round_ = 0;
    int wanted_ = 0, busy_ = 0;

    void take_all(const std::function<void(int64_t)>& work, int64_t count) {
        for (int64_t index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < count;) work(index);
    }

    void serve(int number) {
        std::unique_lock lock(mutex_);
        for (uint64_t seen = round_ - 1;;) {
            begun_.wait(lock, [&] { return round_ != seen; });
            seen = round_;
            if (number >= wanted_) continue;
            const auto* work = work_;
            const int64_t count = count_;
            lock.unlock();
            take_all(*work, count);
            lock.lock();
            if (--busy_ == 0) ended_.notify_one();
        }
    }
};

// PyTorch's own threads, where it brought OpenMP with it: they go on spinning for a while after each of its operations, and would keep ours from the cores.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

Parallel of_openmp() {
#if defined(__unix__) || defined(__APPLE__)
    static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    static const int64_t owner = process();
    return owner == process() ? found : nullptr;  // OpenMP has no threads in a forked child, and waits for them forever
#else
    return nullptr;
#endif
}

struct Shared {
    std::atomic<int64_t> next{0};
    int64_t count;
    const std::function<void(int64_t)>* work;

    static void take_all(void* given) {
        auto* shared = static_cast<Shared*>(given);
        for (int64_t index; (index = shared->next.fetch_add(1, std::memory_order_relaxed)) < shared->count;) (*shared->work)(index);
    }
};

// Never destroyed: its threads wait for work until the process ends. A forked child has none of its parent's threads, and leaves the parent's crew alone.
Crew& crew() {
    static std::atomic<Crew*> current{nullptr};
    Crew* found = current.load();
    while (!found || found->owner != process()) {
        auto* fresh = new Crew;
        if (current.compare_exchange_strong(found, fresh)) return *fresh;
        delete fresh;
    }
    return *found;
}

}  // namespace

void share(int64_t count, int threads, const std::function<void(int64_t)>& work) {
    if (threads > count) threads = static_cast<int>(count);
    if (threads > 1) {
        if (const Parallel parallel = of_openmp()) {
            Shared shared{.count = count, .work = &work};
            return parallel(&Shared::take_all, &shared, static_cast<unsigned>(threads), 0);
        }
        Crew& all = crew();
        if (std::unique_lock lock(all.in_use, std::try_to_lock); lock.owns_lock()) return all.run(count, threads, work);
    }
    for (int64_t index = 0; index < count; ++index) work(index);
}

}  // namespace twofold
