// `import patchpack._C` gives the operators `patchpack::<op>.native` their kernels, which every
// <op>.cpp registers at its end. Their schemas are in patchpack/ops/<op>.py.
#include <Python.h>

#include "level.h"
#include "tensor.h"

STABLE_TORCH_LIBRARY_FRAGMENT(patchpack, library) {
  library.def("cpu_capability(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CompositeExplicitAutograd, library) {
  library.impl("cpu_capability", TORCH_BOX(&patchpack::cpu_capability));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
