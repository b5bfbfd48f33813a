//! The labels of a container, and the origin of each. Pure.
//!
//! Docker and Podman copy the labels of an image to each container that is created from it, and list both as the
//! container's. A label alone therefore does not show whether the host's user set it or the author of the image. A label
//! counts as the container's own only if the image does not have the same label with the same value. If the image cannot be
//! inspected, because it was deleted, no label counts as the container's own.

use std::collections::{BTreeMap, HashMap};

/// The label that a dev container tool writes: the content of a `devcontainer.json`, of the image or of both.
pub const METADATA: &str = "devcontainer.metadata";
/// The prefix of landfall's labels.
const PREFIX: &str = "dev.landfall.";

/// The maximum size of an image's labels that are kept, in bytes. Labels written by hand take a few hundred.
const IMAGE_BYTES_MAX: usize = 64 * 1024;

/// Returns whether landfall reads labels of this name. No other label of an image is kept.
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

/// The origin of a container's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LabelOrigin {
    /// The container: the label was set when it was created.
    Container,
    /// The image, which has the same label.
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
    /// Returns all labels of a container, with those of its image.
    pub fn new(all: BTreeMap<String, String>, image: ImageLabels) -> ContainerLabels {
        ContainerLabels { all, image }
    }

    /// Returns the labels of a container that is created from an image and gets no others.
    pub fn of_image(labels: BTreeMap<String, String>) -> ContainerLabels {
        let image = ImageLabels::of(labels.clone());
        ContainerLabels { all: labels, image }
    }

    /// Returns whether a container has labels that landfall reads, so that the labels of its image are needed.
    pub(super) fn depend_on_image(labels: &HashMap<String, String>) -> bool {
        labels.keys().any(|name| is_read(name))
    }

    /// Returns a label with its origin.
    pub fn get(&self, name: &str) -> Option<(&str, LabelOrigin)> {
        let value = self.all.get(name)?;
        let origin = match &self.image {
            ImageLabels::Known(image) if image.get(name) == Some(value) => LabelOrigin::Image,
            ImageLabels::Known(_) => LabelOrigin::Container,
            ImageLabels::Unknown => LabelOrigin::Unknown,
        };
        Some((value, origin))
    }

    /// Returns a label that was set on the container itself.
    pub fn own(&self, name: &str) -> Option<&str> {
        self.get(name).filter(|(_, origin)| *origin == LabelOrigin::Container).map(|(value, _)| value)
    }

    /// Returns a label of the image.
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
    fn c23_a_label_is_the_containers_own_if_its_image_has_another_value() {
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
    fn only_labels_that_are_read_are_kept_of_an_image() {
        let other = ImageLabels::of(map(&[("maintainer", "x"), ("dev.landfall.deny", "1")]));
        assert_eq!(other, ImageLabels::Known(map(&[("dev.landfall.deny", "1")])));
        let long = "1,".repeat(IMAGE_BYTES_MAX);
        assert_eq!(ImageLabels::of(map(&[("dev.landfall.deny", &long)])), ImageLabels::Unknown);
        assert_ne!(ImageLabels::of(map(&[("maintainer", &long)])), ImageLabels::Unknown);
    }
}
