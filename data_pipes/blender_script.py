"""Runs inside Blender, never in our process: `blender --background --python blender_script.py`. See blender.py.

Each line of the standard input names a folder with a job; when it is done there is an `answer.json` in it. Standard
library and bpy alone: the Python of a distribution's Blender may be without NumPy. For Blender 3.4 to 5.x.

The object frame is taken for Blender's world as it is: its cameras look down -z with y up, as ours do, and nothing
else in a picture depends on which way is up.
"""

import array
import json
import os
import sys
import time

import bpy

OLDEST = (3, 4, 0)
LENS = 1000.0  # millimetres; the sensor, which may not be smaller than 1 mm, makes the focal length
NO_ALPHA = 1e-6
BLACK = 2e-5  # linear light, still the byte 0: Blender 5 takes a surface of less for one that is not there


class Refused(Exception):
    """What the user can put right, as a sentence."""


def numbers(folder, name, kind):
    """The little-endian numbers of a file; `kind` as in the module array."""
    values = array.array(kind)
    with open(os.path.join(folder, name), "rb") as file:
        values.frombytes(file.read())
    if sys.byteorder == "big":
        values.byteswap()
    return values


# ------------------------------------------------------------------------------------------------- the scene


def clear():
    """Nothing is left of the start-up scene, or of the job before."""
    for kind in ("objects", "meshes", "materials", "images", "lights", "cameras", "worlds"):
        collection = getattr(bpy.data, kind)
        for block in list(collection):
            collection.remove(block)


def place(name, data):
    thing = bpy.data.objects.new(name, data)
    bpy.context.scene.collection.objects.link(thing)
    return thing


def make_mesh(folder, job):
    mesh = bpy.data.meshes.new("mesh")
    n_faces = job["n_faces"]
    mesh.vertices.add(job["n_vertices"])
    mesh.vertices.foreach_set("co", numbers(folder, "vertices", "f"))
    mesh.loops.add(3 * n_faces)
    mesh.loops.foreach_set("vertex_index", numbers(folder, "faces", "i"))
    mesh.polygons.add(n_faces)
    mesh.polygons.foreach_set("loop_start", array.array("i", range(0, 3 * n_faces, 3)))
    if bpy.app.version < (3, 6, 0):  # later it follows from the starts, and may not be set
        mesh.polygons.foreach_set("loop_total", array.array("i", [3]) * n_faces)
    mesh.polygons.foreach_set("material_index", numbers(folder, "face_material", "i"))
    mesh.polygons.foreach_set("use_smooth", array.array("b", [0]) * n_faces)
    if job["has_uv"]:
        mesh.uv_layers.new(name="uv").data.foreach_set("uv", numbers(folder, "corner_uv", "f"))
    if job["has_rgba"]:
        colors = mesh.attributes.new("rgba", "FLOAT_COLOR", "CORNER")
        colors.data.foreach_set("color", numbers(folder, "corner_rgba", "f"))
    mesh.update(calc_edges=True)
    return mesh


def make_images(folder, job):
    images = []
    for i, (width, height) in enumerate(job["textures"]):
        image = bpy.data.images.new(f"texture{i}", width, height, alpha=True, float_buffer=True)
        image.colorspace_settings.name = "Non-Color"  # the numbers are linear light already
        image.alpha_mode = "CHANNEL_PACKED"
        image.pixels.foreach_set(numbers(folder, f"texture{i}", "f"))
        image.update()
        images.append(image)
    return images


def make_light(job, camera):
    """A sun that goes with the camera, and light from everywhere.

    A surface with the albedo a that sees all of both is lit to a * (ambient + diffuse * cos): a sun of strength E
    makes a * E / pi * cos, a world of strength L makes a * L.
    """
    import mathutils

    sun = bpy.data.lights.new("sun", "SUN")
    sun.energy = job["diffuse"] * 3.141592653589793
    sun.angle = job["sun_angle"]
    light = place("sun", sun)
    light.parent = camera
    light.rotation_mode = "QUATERNION"
    light.rotation_quaternion = mathutils.Vector(job["light_in_camera"]).to_track_quat("Z", "Y")
    world = bpy.data.worlds.new("world")
    if bpy.app.version < (5, 0, 0):  # later they always do
        world.use_nodes = True
    bpy.context.scene.world = world
    background = next(node for node in world.node_tree.nodes if node.type == "BACKGROUND")
    background.inputs["Color"].default_value = (1, 1, 1, 1)
    background.inputs["Strength"].default_value = job["ambient"]


# ------------------------------------------------------------------------------------------------- materials


class Nodes:
    """The nodes of one material, wired by what is called."""

    def __init__(self, material):
        if bpy.app.version < (5, 0, 0):
            material.use_nodes = True
        self.material, self.tree = material, material.node_tree
        self.tree.nodes.clear()

    def add(self, kind, *inputs, **settings):
        """A node with its inputs, by position: sockets, or values; None leaves one alone."""
        node = self.tree.nodes.new("ShaderNode" + kind)
        for name, value in settings.items():
            setattr(node, name, value)
        for socket, value in zip(node.inputs, inputs):
            if isinstance(value, bpy.types.NodeSocket):
                self.tree.links.new(value, socket)
            elif value is not None:
                socket.default_value = value
        return node

    def math(self, operation, a, b):
        return self.add("Math", a, b, operation=operation).outputs[0]

    def vector(self, operation, a, b):
        return self.add("VectorMath", a, b, operation=operation).outputs[0]


def make_material(spec, images, job, textureless, lit):
    """Colour and alpha as in mesh.py: base times texture times corner, cut to [0, 1]."""
    nodes = Nodes(bpy.data.materials.new("material"))
    red, green, blue, alpha = spec["base"]
    color = (red, green, blue)
    if spec["texture"] is not None and job["has_uv"]:
        uv = nodes.add("UVMap", uv_map="uv").outputs[0]
        texel = nodes.add("TexImage", uv, image=images[spec["texture"]], interpolation="Linear", extension="REPEAT")
        color, alpha = times(nodes, color, alpha, texel)
    if job["has_rgba"]:
        color, alpha = times(nodes, color, alpha, nodes.add("Attribute", attribute_name="rgba"))
    color = nodes.vector("MINIMUM", nodes.vector("MAXIMUM", color, (BLACK,) * 3), (1, 1, 1))
    if spec["alpha_mode"] == "OPAQUE":
        alpha = 1.0
    elif spec["alpha_mode"] == "MASK":
        alpha = nodes.math("SUBTRACT", 1.0, nodes.math("LESS_THAN", alpha, spec["alpha_cutoff"]))
    else:
        alpha = nodes.math("MINIMUM", nodes.math("MAXIMUM", alpha, 0.0), 1.0)
    if textureless:
        color = (job["textureless_albedo"],) * 3
    surface = nodes.add("BsdfDiffuse" if lit else "Emission", color if not textureless else (*color, 1))
    clear = nodes.add("BsdfTransparent", (1, 1, 1, 1))
    mixed = nodes.add("MixShader", alpha, clear.outputs[0], surface.outputs[0])
    nodes.add("OutputMaterial", mixed.outputs[0])
    if not lit:
        measure(nodes, alpha)
    return nodes.material


def times(nodes, color, alpha, node):
    color = nodes.vector("MULTIPLY", color, node.outputs["Color"])
    return color, nodes.math("MULTIPLY", alpha, node.outputs["Alpha"])


def measure(nodes, alpha):
    """Depth and normal of the first surface that is there at all, as sums over a pixel's samples that count them.

    The passes of these names would be one sample's (depth), or mixed with what is not covered (normal). What is
    written by surfaces that a ray passes is added up until one reaches `pass_alpha_threshold`: no alpha, no share.
    """
    there = nodes.math("GREATER_THAN", alpha, NO_ALPHA)
    depth = nodes.add("CameraData").outputs["View Z Depth"]
    normal = nodes.add("NewGeometry").outputs["True Normal"]  # the side that is seen
    gap = nodes.add("CombineXYZ", nodes.math("MULTIPLY", depth, there), there, 0.0).outputs[0]
    aov(nodes, "measured", gap)
    aov(nodes, "normal", nodes.vector("MULTIPLY", normal, there))


def aov(nodes, name, color):
    node = nodes.add("OutputAOV", color)
    if hasattr(node, "aov_name"):
        node.aov_name = name
    else:  # before 4.2
        node.name = name


# ------------------------------------------------------------------------------------------------- rendering


def set_up(job):
    """What is the same for all pictures."""
    scene = bpy.context.scene
    try:
        scene.render.engine = "CYCLES"
    except TypeError:
        raise Refused("this Blender was built without Cycles; take one from blender.org") from None
    render, cycles, layer = scene.render, scene.cycles, bpy.context.view_layer
    render.resolution_x, render.resolution_y, render.resolution_percentage = job["width"], job["height"], 100
    render.pixel_aspect_x = render.pixel_aspect_y = 1
    render.use_border = render.use_compositing = render.use_sequencer = render.use_motion_blur = False
    render.film_transparent = True
    render.use_persistent_data = True
    if job["threads"]:
        render.threads_mode, render.threads = "FIXED", job["threads"]
    else:
        render.threads_mode = "AUTO"
    file = render.image_settings
    if hasattr(file, "media_type"):  # 5.0
        file.media_type = "MULTI_LAYER_IMAGE"
    file.file_format, file.color_depth, file.exr_codec = "OPEN_EXR_MULTILAYER", "32", "NONE"
    if hasattr(file, "use_exr_interleave"):  # 5.0; else each pass is a part of its own
        file.use_exr_interleave = True
    cycles.samples, cycles.seed = job["samples"], job["seed"]
    cycles.use_adaptive_sampling = cycles.use_denoising = False
    cycles.pixel_filter_type, cycles.filter_width = "BOX", 1.0
    cycles.diffuse_bounces = cycles.max_bounces = job["bounces"]
    # As many at least as at most: none is left out by chance, to spare time.
    cycles.min_transparent_bounces = cycles.transparent_max_bounces = job["layers"]
    cycles.device = "GPU" if job["device"] == "gpu" else "CPU"
    if job["device"] == "gpu":
        use_gpu()
    layer.pass_alpha_threshold = NO_ALPHA
    layer.use_pass_z = False
    for name in ("measured", "normal"):
        if name not in layer.aovs:
            added = layer.aovs.add()
            added.name, added.type = name, "COLOR"


def use_gpu():
    settings = bpy.context.preferences.addons["cycles"].preferences
    for kind in ("OPTIX", "CUDA", "HIP", "ONEAPI", "METAL"):
        try:
            settings.compute_device_type = kind
        except TypeError:
            continue
        settings.get_devices()
        if any(device.type == kind for device in settings.devices):
            for device in settings.devices:
                device.use = device.type == kind
            return
    raise Refused("Blender finds no graphics card that Cycles can use; set device to cpu")


def point(camera, matrix, focal, job):
    import mathutils

    camera.matrix_world = mathutils.Matrix(matrix)
    data = camera.data
    data.sensor_fit, data.lens = "HORIZONTAL", LENS
    data.sensor_width = LENS * job["width"] / focal
    data.shift_x = data.shift_y = 0.0
    data.clip_start, data.clip_end = 1e-4, 1e6


def run(folder):
    with open(os.path.join(folder, "job.json"), encoding="utf-8") as file:
        job = json.load(file)
    clear()
    set_up(job)
    mesh = make_mesh(folder, job)
    place("mesh", mesh)
    images = make_images(folder, job)
    camera = place("camera", bpy.data.cameras.new("camera"))
    bpy.context.scene.camera = camera
    make_light(job, camera)
    seconds: dict[str, list[float]] = {}
    for mode in job["modes"]:
        lit = mode != "unlit"
        materials = [make_material(spec, images, job, mode == "textureless", lit) for spec in job["materials"]]
        for i, material in enumerate(materials):
            if i < len(mesh.materials):
                mesh.materials[i] = material
            else:
                mesh.materials.append(material)
        seconds[mode] = []
        for view, (matrix, focal) in enumerate(zip(job["cameras"]["camera_to_world"], job["cameras"]["focal"])):
            point(camera, matrix, focal, job)
            bpy.context.scene.render.filepath = os.path.join(folder, f"{mode}{view}.exr")
            start = time.perf_counter()
            bpy.ops.render.render(write_still=True)
            seconds[mode].append(time.perf_counter() - start)
    return {"seconds": seconds, "version": bpy.app.version_string}


def main():
    for line in sys.stdin:
        folder = line.rstrip("\n")
        try:
            if bpy.app.version < OLDEST:
                raise Refused(f"this is Blender {bpy.app.version_string}, and 3.4 or newer is needed")
            answer = run(folder)
        except Refused as refused:
            answer = {"refused": str(refused)}
        aside = os.path.join(folder, "answer.partial")
        with open(aside, "w", encoding="utf-8") as file:
            json.dump(answer, file)
        os.replace(aside, os.path.join(folder, "answer.json"))


main()
