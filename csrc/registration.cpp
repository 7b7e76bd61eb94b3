// What `import patchpack._C` does: it gives the operators `patchpack::<op>.native` their kernels.
// Their schemas are in patchpack/ops/<op>.py.
#include <Python.h>

#include "level.h"
#include "ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(patchpack, library) {
  library.def("cpu_capability(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CompositeExplicitAutograd, library) {
  library.impl("cpu_capability", TORCH_BOX(&patchpack::cpu_capability));
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("rope.native", TORCH_BOX(&patchpack::rope));
  library.impl("rope_2d.native", TORCH_BOX(&patchpack::rope_2d));
  library.impl("mrope.native", TORCH_BOX(&patchpack::mrope));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
