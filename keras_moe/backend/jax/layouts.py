"""How a variable is divided.

A distribution tells the layout of a variable: from Keras 3.13 on a `TensorLayout` always, before,
once the variable is made, what JAX makes of that.
"""

import keras


def layout_of(variable):
    """The `TensorLayout` of a variable under the distribution that is here."""
    layout = keras.distribution.distribution().get_variable_layout(variable)
    if isinstance(layout, keras.distribution.TensorLayout):
        return layout
    axes = (*layout.spec, *[None] * (len(variable.shape) - len(layout.spec)))
    devices = layout.mesh.devices
    names = [f"{device.platform}:{device.id}" for device in devices.flat]
    mesh = keras.distribution.DeviceMesh(devices.shape, layout.mesh.axis_names, names)
    return keras.distribution.TensorLayout(axes, mesh)
