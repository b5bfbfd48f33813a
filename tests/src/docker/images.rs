//! The images of the fake engine: labels, and whether an image is there.

use serde_json::json;

use super::{FakeDocker, Reply};

/// The first part of an image's id; the image's name follows.
const ID: &str = "sha256:";

/// The id of the image of this name.
pub(super) fn id_of(image: &str) -> String {
    format!("{ID}{image}")
}

impl FakeDocker {
    /// Has an image with labels.
    pub fn add_image(&self, image: &str, labels: &[(&str, &str)]) {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        self.state().images.insert(image.to_owned(), Some(labels));
    }

    /// Deletes an image, as `docker rmi -f` does while containers of it are there.
    pub fn delete_image(&self, image: &str) {
        self.state().images.insert(image.to_owned(), None);
    }

    /// Describes an image by its name or by its id.
    pub(super) fn inspect_image(&self, wanted: &str) -> Reply {
        let name = wanted.strip_prefix(ID).unwrap_or(wanted);
        match self.state().images.get(name) {
            Some(None) => Reply::Json(404, json!({"message": format!("No such image: {wanted}")})),
            labels => Reply::Json(200, json!({"Id": wanted, "Config": {"Labels": labels}})),
        }
    }
}
