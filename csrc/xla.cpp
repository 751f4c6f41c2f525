// SPDX-License-Identifier: Apache-2.0
// Handlers that XLA calls: they check what they are given, lay it out as a plan, and run it.
//
// XLA has no rows that are strided, late or shared: buffers are dense, and apart unless an operand
// is said to be a result too. What it compiled is asked again all the same, for a wrong number here
// would be a wrong byte there.
#include "xla.h"

#include <cmath>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/run.h"
#include "xla_ffi.h"

namespace pyupdate::xla {

namespace {

const cpu::Passes& (*passes)() = nullptr;

// What is in front of a rule's numbers.
enum Control : int64_t { kSkip, kClipValue, kStep, kNumbers };

// ----- what XLA passes

int64_t elements(const ffi::Buffer& buffer) {
  int64_t product = 1;
  for (int64_t d = 0; d < buffer.rank; ++d) product *= buffer.dims[d];
  return product;
}

const ffi::Buffer& buffer_at(const ffi::Buffers& buffers, int64_t k) {
  if (k < 0 || k >= buffers.size) throw std::invalid_argument("too few buffers");
  return *buffers.at[k];
}

int64_t address(const ffi::Buffer& buffer) { return reinterpret_cast<int64_t>(buffer.data); }

// An index into Storages whose roles all have a dtype.
int64_t storage_of(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::kF64:
      return 0;
    case ffi::kF32:
      return 1;
    case ffi::kBF16:
      return 2;
    case ffi::kF16:
      return 3;
  }
  throw std::invalid_argument("a buffer of a dtype that no pass is compiled for");
}

const double* numbers_at(const ffi::Buffers& buffers, int64_t k, int64_t least) {
  const ffi::Buffer& found = buffer_at(buffers, k);
  if (found.dtype != ffi::kF64 || elements(found) < least) {
    throw std::invalid_argument("numbers must be of fp64, and all there");
  }
  return static_cast<const double*>(found.data);
}

int64_t rule_of(const ffi::Attributes& attributes) {
  for (int64_t k = 0; k < attributes.size; ++k) {
    const ffi::ByteSpan& name = *attributes.names[k];
    if (std::string(name.data, name.size) != "rule" || attributes.types[k] != ffi::kString) {
      continue;
    }
    const auto& given = *static_cast<const ffi::ByteSpan*>(attributes.values[k]);
    const std::string rule(given.data, given.size);
    for (int i = 0; i < passes().rule_count; ++i) {
      if (rule == passes().rules[i].name) return i;
    }
    throw std::invalid_argument("no compiled rule is named '" + rule + "'");
  }
  throw std::invalid_argument("the attribute 'rule' is missing");
}

cpu::Request request_of(const ffi::CallFrame& frame) {
  cpu::Request request;
  // XLA calls from whatever thread it likes, and each that begins an OpenMP region gets a pool of
  // its own, whose threads spin on while TensorFlow's want the cores.
  request.plain_threads = true;
  int64_t count = 1;
  ffi::CountThreads asked{sizeof(ffi::CountThreads), nullptr, frame.context, &count};
  if (ffi::Error* error = frame.api->count_threads(&asked)) {
    ffi::DestroyError gone{sizeof(ffi::DestroyError), nullptr, error};
    frame.api->destroy_error(&gone);
    count = 1;
  }
  request.threads = static_cast<int>(count);
  return request;
}

void add_row(cpu::Tables& tables, int64_t size, int32_t hyper, const int64_t* addresses) {
  tables.add_row({size, 0, 0, hyper, -1}, addresses, nullptr);
}

// ----- measure

void measure(const ffi::CallFrame& frame) {
  const int64_t rows = frame.arguments.size - 1;
  cpu::Request request = request_of(frame);
  request.unscale = *numbers_at(frame.arguments, 0, 1);
  request.reduce = true;
  request.apply = false;
  cpu::Tables tables(kFirstState);
  for (int64_t r = 0; r < rows; ++r) {
    const ffi::Buffer& grad = buffer_at(frame.arguments, 1 + r);
    const int64_t storage = storage_of(grad.dtype);
    if (tables.hyper_rows.empty() || tables.hyper_rows.back().storage != storage) {
      tables.hyper_rows.push_back({0, storage, 0, 1, 1.0});
    }
    // The reduce pass looks at gradients alone.
    const int64_t addresses[] = {address(grad), address(grad)};
    add_row(tables, elements(grad), static_cast<int32_t>(tables.hyper_rows.size()) - 1, addresses);
  }
  tables.cut();
  std::vector<double> sums;
  const cpu::Outcome outcome = cpu::reduce_rows(passes(), tables, request, sums);
  auto* found = const_cast<double*>(numbers_at(frame.results, 0, 2 + rows));
  std::memcpy(found + 2, sums.data(), static_cast<size_t>(rows) * sizeof(double));
  found[0] = std::sqrt(passes().halving_tree(sums.data(), rows));
  found[1] = outcome.nonfinite ? 1.0 : 0.0;
}

// ----- step

// XLA may have put a result elsewhere than its operand, though it was told that they are one.
int64_t address_in_place(const ffi::Buffer& operand, const ffi::Buffer& result, int64_t itemsize) {
  if (operand.dtype != result.dtype || elements(operand) != elements(result)) {
    throw std::invalid_argument("a result is not like its operand");
  }
  if (operand.data != result.data) {
    std::memcpy(result.data, operand.data, static_cast<size_t>(elements(operand) * itemsize));
  }
  return address(result);
}

void step(const ffi::CallFrame& frame) {
  const int64_t index = rule_of(frame.attributes);
  const cpu::RuleInfo& rule = passes().rules[index];
  if (rule.scalars != 0) throw std::invalid_argument("a rule with scalars has no handler");
  const ffi::Buffers& given = frame.arguments;
  const int64_t written = 1 + rule.states;  // a row
  const int64_t rows = (given.size - 2) / (written + 1);
  if (given.size != 2 + rows * (written + 1) || frame.results.size != rows * written) {
    throw std::invalid_argument("parameters, states and gradients must be as many");
  }
  const double* control = numbers_at(given, 0, kNumbers + rule.numbers - 1);
  const double* multipliers = numbers_at(given, 1, 1);
  const int64_t several = elements(buffer_at(given, 1));
  if (several != 1 && several != rows) {
    throw std::invalid_argument("there must be one multiplier, or one a parameter");
  }
  cpu::Request request = request_of(frame);
  request.clip_value = control[kClipValue];

  cpu::Tables tables(kFirstState + rule.states);
  tables.hypers.resize(static_cast<size_t>(rule.hypers));
  std::vector<double> numbers{control[kStep]};  // then what the group gives
  numbers.insert(numbers.end(), control + kNumbers, control + kNumbers + rule.numbers - 1);
  rule.prepare(numbers.data(), tables.hypers.data());
  for (int64_t r = 0; r < rows; ++r) {
    const ffi::Buffer& param = buffer_at(given, 2 + r);
    const ffi::Buffer& grad = buffer_at(given, 2 + rows * written + r);
    const int64_t storage = storage_of(param.dtype);
    const cpu::StorageInfo& info = passes().storages[storage];
    if (grad.dtype != param.dtype || elements(grad) != elements(param)) {
      throw std::invalid_argument("a gradient is not like its parameter");
    }
    int64_t addresses[kMaxRoles];
    addresses[kGrad] = address(grad);
    for (int64_t k = 0; k < written; ++k) {
      const ffi::Buffer& operand = buffer_at(given, 2 + k * rows + r);
      if (operand.dtype != param.dtype || elements(operand) != elements(param)) {
        throw std::invalid_argument("a state is not like its parameter");
      }
      const ffi::Buffer& result = buffer_at(frame.results, k * rows + r);
      addresses[k == 0 ? kParam : kFirstState + k - 1] =
          address_in_place(operand, result, info.itemsize[kParam]);
    }
    // The multiplier of one row has its place beside the sign.
    const double own = multipliers[several == 1 ? 0 : r];
    const bool same = !tables.hyper_rows.empty() && tables.hyper_rows.back().storage == storage &&
                      tables.hyper_rows.back().sign == own;
    if (!same) {
      tables.hyper_rows.push_back({index, storage, 0, static_cast<int64_t>(control[kStep]), own});
    }
    add_row(tables, elements(param), static_cast<int32_t>(tables.hyper_rows.size()) - 1, addresses);
  }
  if (control[kSkip] != 0.0) return;
  tables.cut();
  cpu::run(passes(), tables, request);
}

// ----- as XLA calls them

ffi::Error* failed(const ffi::CallFrame& frame, ffi::ErrorCode code, const char* what) {
  const std::string message = std::string("pyupdate: ") + what;
  ffi::CreateError made{sizeof(ffi::CreateError), nullptr, message.c_str(), code};
  return frame.api->create_error(&made);
}

template <void (*body)(const ffi::CallFrame&)>
ffi::Error* handle(ffi::CallFrame* frame) {
  if (frame->extensions != nullptr && frame->extensions->type == ffi::kMetadataExtension) {
    auto& asked = *reinterpret_cast<ffi::MetadataExtension*>(frame->extensions);
    asked.metadata->version.major = ffi::kMajorVersion;
    asked.metadata->version.minor = ffi::kMinorVersion;
    return nullptr;
  }
  try {
    const cpu::ContractMode mode;  // TensorFlow's threads take subnormals for zero
    body(*frame);
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return failed(*frame, ffi::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return failed(*frame, ffi::kInternal, error.what());
  }
}

std::string registered(const ffi::Api& api, const std::string& name, ffi::Handler* handler) {
  constexpr char kPlatform[] = "Host";
  ffi::Register asked{sizeof(ffi::Register),
                      nullptr,
                      {name.data(), name.size()},
                      {kPlatform, sizeof(kPlatform) - 1},
                      {nullptr, nullptr, nullptr, handler},
                      0};
  ffi::Error* error = api.register_handler(&asked);
  if (error == nullptr) return "";
  ffi::ErrorMessage said{sizeof(ffi::ErrorMessage), nullptr, error, nullptr};
  api.error_message(&said);
  std::string message = said.message;
  ffi::DestroyError gone{sizeof(ffi::DestroyError), nullptr, error};
  api.destroy_error(&gone);
  return message;
}

}  // namespace

std::string register_handlers(uintptr_t address, const std::string& prefix,
                              const cpu::Passes& (*passes_now)()) {
  const auto& api = *reinterpret_cast<const ffi::Api*>(address);
  const ffi::Version& version = api.version;
  if (version.major != ffi::kMajorVersion || version.minor != ffi::kMinorVersion ||
      api.struct_size < sizeof(ffi::Api)) {
    return "XLA's foreign function interface is of version " + std::to_string(version.major) + "." +
           std::to_string(version.minor) + ", and this build knows " +
           std::to_string(ffi::kMajorVersion) + "." + std::to_string(ffi::kMinorVersion);
  }
  passes = passes_now;
  const std::string refused = registered(api, prefix + "_measure", &handle<measure>);
  return refused.empty() ? registered(api, prefix + "_step", &handle<step>) : refused;
}

}  // namespace pyupdate::xla
