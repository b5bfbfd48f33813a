//! The labels of a container, and which of them it has from its image. Pure.
//!
//! Docker and Podman copy the labels of an image to each container that is made of it, and list both as the container's.
//! So a label alone does not show whether the host's user wrote it or the author of an image that the user ran. A label
//! counts as the container's own only where the image does not have the same one with the same value. Where the image
//! cannot be inspected, because it has been deleted, no label counts as the container's own.

use std::collections::{BTreeMap, HashMap};

/// The label that a dev container tool writes: what a `devcontainer.json` says, of the image or of both.
pub const METADATA: &str = "devcontainer.metadata";
/// The start of each of our own labels.
const PREFIX: &str = "dev.landfall.";

/// The most bytes of an image's labels that are kept. Labels written by hand take a few hundred.
const IMAGE_BYTES_MAX: usize = 64 * 1024;

/// Whether landfall reads labels of this name. No other label of an image is kept.
fn is_read(name: &str) -> bool {
    name.starts_with(PREFIX) || name == METADATA
}

/// The labels of an image that landfall reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageLabels {
    /// As the engine reports them.
    Known(BTreeMap<String, String>),
    /// The image cannot be inspected, or its labels are too long to keep.
    Unknown,
}

impl ImageLabels {
    /// Keeps the labels that landfall reads.
    pub fn of(labels: impl IntoIterator<Item = (String, String)>) -> ImageLabels {
        let read: BTreeMap<String, String> = labels.into_iter().filter(|(name, _)| is_read(name)).collect();
        let bytes: usize = read.iter().map(|(name, value)| name.len() + value.len()).sum();
        if bytes > IMAGE_BYTES_MAX { ImageLabels::Unknown } else { ImageLabels::Known(read) }
    }
}

/// Where a label of a container comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LabelOrigin {
    /// The container was given it when it was made.
    Container,
    /// Its image has the same.
    Image,
    /// Its image cannot be inspected.
    Unknown,
}

/// The labels of one container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerLabels {
    all: BTreeMap<String, String>,
    image: ImageLabels,
}

impl ContainerLabels {
    /// All labels of a container, beside those of its image.
    pub fn new(all: BTreeMap<String, String>, image: ImageLabels) -> ContainerLabels {
        ContainerLabels { all, image }
    }

    /// The labels of a container that is to be made of an image, and gets no others.
    pub fn of_image(labels: BTreeMap<String, String>) -> ContainerLabels {
        let image = ImageLabels::of(labels.clone());
        ContainerLabels { all: labels, image }
    }

    /// Whether one of these labels of a container is read, so that it matters what its image has.
    pub(super) fn depend_on_image(labels: &HashMap<String, String>) -> bool {
        labels.keys().any(|name| is_read(name))
    }

    /// A label, wherever it comes from.
    pub fn get(&self, name: &str) -> Option<(&str, LabelOrigin)> {
        let value = self.all.get(name)?;
        let origin = match &self.image {
            ImageLabels::Known(image) if image.get(name) == Some(value) => LabelOrigin::Image,
            ImageLabels::Known(_) => LabelOrigin::Container,
            ImageLabels::Unknown => LabelOrigin::Unknown,
        };
        Some((value, origin))
    }

    /// A label that the container was given itself.
    pub fn own(&self, name: &str) -> Option<&str> {
        self.get(name).filter(|(_, origin)| *origin == LabelOrigin::Container).map(|(value, _)| value)
    }

    /// A label of the image.
    pub fn of_its_image(&self, name: &str) -> Option<&str> {
        match &self.image {
            ImageLabels::Known(image) => image.get(name).map(String::as_str),
            ImageLabels::Unknown => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn c23_a_label_is_the_containers_own_where_its_image_has_another_value() {
        let image = ImageLabels::of(map(&[("dev.landfall.name", "x"), ("dev.landfall.allow", "22")]));
        let all = map(&[
            ("dev.landfall.name", "x"),
            ("dev.landfall.allow", "3000"),
            ("dev.landfall.forward", "true"),
        ]);
        let labels = ContainerLabels::new(all.clone(), image);
        assert_eq!(labels.get("dev.landfall.name"), Some(("x", LabelOrigin::Image)));
        assert_eq!(labels.own("dev.landfall.name"), None);
        assert_eq!(labels.own("dev.landfall.allow"), Some("3000"));
        assert_eq!(labels.own("dev.landfall.forward"), Some("true"));
        assert_eq!(labels.own("other"), None);
        let labels = ContainerLabels::new(all, ImageLabels::Unknown);
        assert_eq!(labels.own("dev.landfall.forward"), None);
        assert_eq!(labels.get("dev.landfall.forward"), Some(("true", LabelOrigin::Unknown)));
    }

    #[test]
    fn an_image_keeps_little_in_memory() {
        let other = ImageLabels::of(map(&[("maintainer", "x"), ("dev.landfall.deny", "1")]));
        assert_eq!(other, ImageLabels::Known(map(&[("dev.landfall.deny", "1")])));
        let long = "1,".repeat(IMAGE_BYTES_MAX);
        assert_eq!(ImageLabels::of(map(&[("dev.landfall.deny", &long)])), ImageLabels::Unknown);
        assert_ne!(ImageLabels::of(map(&[("maintainer", &long)])), ImageLabels::Unknown);
    }
}
