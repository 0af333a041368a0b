// NEVER RUN; see copier_cuda.h. Only the runtime API is used, there is no kernel in this file.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "copier_cuda.h"
#ifdef VF_NVTX
#include <nvtx3/nvToolsExt.h>
#endif

namespace vf {

namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA refuses ") + what + ": " +
                             cudaGetErrorString(status) + ".");
  }
}

cudaStream_t stream_of(void* handle) { return static_cast<cudaStream_t>(handle); }
cudaStream_t stream_of(Stream handle) { return reinterpret_cast<cudaStream_t>(handle); }
cudaEvent_t event_of(void* handle) { return static_cast<cudaEvent_t>(handle); }

// In a captured graph the events below would be nodes, never done, and a replay would copy into
// slots that others have by then.
void refuse_capture(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "the state of the caller's stream");
  if (status != cudaStreamCaptureStatusNone) {
    throw std::runtime_error(
        "expected a stream that runs, got one whose CUDA graph is being captured; capture without "
        "offload.");
  }
}

// Makes the copier's device current for a call and puts the caller's back.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "the current device");
    if (before_ != device) {
      check(cudaSetDevice(device), "the copier's device");
      changed_ = true;
    }
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

#ifdef VF_NVTX
struct Range {
  explicit Range(const char* name) { nvtxRangePushA(name); }
  ~Range() { nvtxRangePop(); }
};
#else
struct Range {
  explicit Range(const char*) {}
};
#endif

}  // namespace

CudaCopier::CudaCopier() {
  check(cudaGetDevice(&device_), "the current device");
  try {
    for (Queue& each : queues_) {
      cudaStream_t stream = nullptr;
      check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a copy stream");
      each.stream = stream;
      cudaEvent_t ready = nullptr;
      check(cudaEventCreateWithFlags(&ready, cudaEventDisableTiming), "an event");
      each.ready = ready;
    }
  } catch (...) {
    destroy();
    throw;
  }
}

CudaCopier::~CudaCopier() { destroy(); }

void CudaCopier::destroy() noexcept {  // errors mean that the driver is going down with the process
  int before = 0;
  const bool known = cudaGetDevice(&before) == cudaSuccess;
  cudaSetDevice(device_);
  for (Queue& each : queues_) {
    if (each.stream) cudaStreamSynchronize(stream_of(each.stream));
    for (const Flight& flight : each.flights) {
      cudaEventDestroy(event_of(flight.begin));
      cudaEventDestroy(event_of(flight.end));
    }
    if (each.ready) cudaEventDestroy(event_of(each.ready));
    if (each.stream) cudaStreamDestroy(stream_of(each.stream));
  }
  for (void* event : spare_events_) cudaEventDestroy(event_of(event));
  for (void* chunk : registered_) cudaHostUnregister(chunk);
  if (known) cudaSetDevice(before);
}

void CudaCopier::attach(void* slab, std::size_t bytes, std::size_t chunk_bytes) {
  const OnDevice guard(device_);
  const Range range("copy_out/attach");
  for (std::size_t offset = 0; offset < bytes; offset += chunk_bytes) {
    void* chunk = static_cast<std::byte*>(slab) + offset;
    const std::size_t size = std::min(chunk_bytes, bytes - offset);
    const cudaError_t status = cudaHostRegister(chunk, size, cudaHostRegisterPortable);
    if (status != cudaSuccess) {
      throw std::runtime_error("CUDA cannot page-lock " + std::to_string(size) + " of " +
                               std::to_string(bytes) + " bytes (" + cudaGetErrorString(status) +
                               "); lower the budget, or the container's limits are too low.");
    }
    registered_.push_back(chunk);
  }
}

Mark CudaCopier::start(Direction direction, const Copy& copy, std::optional<Mark> after,
                       Stream stream) {
  const OnDevice guard(device_);
  const Range range(direction == Direction::kOffload ? "copy_out/enqueue" : "copy_in/enqueue");
  refuse_capture(stream_of(stream));
  const std::lock_guard lock(mutex_);
  Queue& own = queue(direction);
  const cudaStream_t copies = stream_of(own.stream);
  // A wait takes the event's latest record at the moment of the call, so one event serves all.
  check(cudaEventRecord(event_of(own.ready), stream_of(stream)), "an event in the caller's stream");
  check(cudaStreamWaitEvent(copies, event_of(own.ready)), "a wait for the caller's stream");
  if (after) {
    if (void* end = end_event(*after)) {
      check(cudaStreamWaitEvent(copies, event_of(end)), "a wait for the copy before");
    }
  }
  Flight flight{take_event(), nullptr, copy.bytes()};
  try {
    flight.end = take_event();
    check(cudaEventRecord(event_of(flight.begin), copies), "an event");
    if (copy.num_rows == 1) {
      check(cudaMemcpyAsync(copy.target, copy.source, copy.row_bytes, cudaMemcpyDefault, copies),
            "a copy");
    } else {
      check(cudaMemcpy2DAsync(copy.target, copy.target_pitch, copy.source, copy.source_pitch,
                              copy.row_bytes, copy.num_rows, cudaMemcpyDefault, copies),
            "a copy of rows");
    }
    check(cudaEventRecord(event_of(flight.end), copies), "an event");
    own.flights.push_back(flight);
  } catch (...) {
    // If the copy was queued, the ranges must outlive it although the caller gets no Mark.
    cudaStreamSynchronize(copies);
    spare_events_.push_back(flight.begin);
    if (flight.end) spare_events_.push_back(flight.end);
    throw;
  }
  return {direction, ++own.num_started};
}

void CudaCopier::wait(Mark mark, Stream stream) {
  const OnDevice guard(device_);
  refuse_capture(stream_of(stream));
  const std::lock_guard lock(mutex_);
  if (void* end = end_event(mark)) {
    check(cudaStreamWaitEvent(stream_of(stream), event_of(end)), "a wait for a copy");
  }
}

void CudaCopier::finish(Mark mark) {
  const OnDevice guard(device_);
  void* end = nullptr;
  {
    const std::lock_guard lock(mutex_);
    end = end_event(mark);
  }
  // The event may have been taken for a later copy by now: that only waits longer.
  if (end) check(cudaEventSynchronize(event_of(end)), "to finish a copy");
}

bool CudaCopier::done(Mark mark) const {
  const OnDevice guard(device_);
  const std::lock_guard lock(mutex_);
  return end_event(mark) == nullptr;
}

CopyStats CudaCopier::stats(Direction direction) const {
  const OnDevice guard(device_);
  const std::lock_guard lock(mutex_);
  reap(queue(direction));
  return queue(direction).stats;
}

Stream CudaCopier::stream(Direction direction) const {
  return reinterpret_cast<Stream>(queue(direction).stream);  // never changes after the constructor
}

void CudaCopier::reap(Queue& of) const {
  while (!of.flights.empty()) {
    const Flight flight = of.flights.front();
    const cudaError_t status = cudaEventQuery(event_of(flight.end));
    if (status == cudaErrorNotReady) return;
    check(status, "to look at a copy");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, event_of(flight.begin), event_of(flight.end)),
          "the time of a copy");
    ++of.num_done;
    ++of.stats.num_copies;
    of.stats.bytes += flight.bytes;
    of.stats.busy_s += 1e-3 * static_cast<double>(ms);
    spare_events_.push_back(flight.begin);
    spare_events_.push_back(flight.end);
    of.flights.pop_front();
  }
}

void* CudaCopier::end_event(Mark mark) const {
  Queue& of = queue(mark.direction);
  reap(of);
  return mark.sequence <= of.num_done ? nullptr : of.flights[mark.sequence - of.num_done - 1].end;
}

void* CudaCopier::take_event() const {
  if (!spare_events_.empty()) {
    void* event = spare_events_.back();
    spare_events_.pop_back();
    return event;
  }
  cudaEvent_t event = nullptr;
  check(cudaEventCreate(&event), "an event");  // with timing, for CopyStats::busy_s
  return event;
}

}  // namespace vf
