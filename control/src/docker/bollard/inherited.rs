//! The labels that containers have from their images, as the engine reports them.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use bollard::errors::Error;
use bollard::models::ContainerSummary;

use super::{DockerError, Engine};
use crate::docker::labels::{ContainerLabels, ImageLabels};

/// The maximum number of images whose labels are cached.
const IMAGES_MAX: usize = 256;

/// The labels of the images of the last list, by the image's id. An id identifies a content, so the labels never change.
/// Without the cache, each Docker event would cause an inspection of each image.
#[derive(Debug, Default)]
pub(in crate::docker) struct ImageCache(Mutex<HashMap<String, ImageLabels>>);

impl ImageCache {
    fn get(&self, id: &str) -> Option<ImageLabels> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    fn insert(&self, id: &str, labels: &ImageLabels) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() < IMAGES_MAX {
            known.insert(id.to_owned(), labels.clone());
        }
    }

    fn keep(&self, listed: &HashMap<String, ImageLabels>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|id, _| listed.contains_key(id));
    }
}

impl Engine {
    /// Returns the labels of the images of these containers by the image's id, for containers for which they are needed.
    pub(super) async fn image_labels_of(
        &self,
        listed: &[ContainerSummary],
        cache: &ImageCache,
    ) -> Result<HashMap<String, ImageLabels>, DockerError> {
        let mut found = HashMap::new();
        for container in listed {
            let matters = container.labels.as_ref().is_some_and(ContainerLabels::depend_on_image);
            let Some(id) = container.image_id.as_ref().filter(|id| matters && !found.contains_key(*id))
            else {
                continue;
            };
            let labels = match cache.get(id) {
                Some(labels) => labels,
                None => self.labels_of_image(id, cache).await?,
            };
            found.insert(id.clone(), labels);
        }
        cache.keep(&found);
        Ok(found)
    }

    /// Returns the labels of an image. They are unknown if the engine answers but has no such image or cannot describe it.
    /// Only known labels are cached, since the image may be restored. An engine that does not answer is an error: an empty
    /// result would revoke the grants of an earlier list.
    async fn labels_of_image(&self, id: &str, cache: &ImageCache) -> Result<ImageLabels, DockerError> {
        // Podman lists a container without an image.
        if id.is_empty() {
            return Ok(ImageLabels::Unknown);
        }
        match self.client.inspect_image(id).await {
            Ok(image) => {
                let labels = image.config.and_then(|config| config.labels).unwrap_or_default();
                let labels = ImageLabels::of(labels);
                cache.insert(id, &labels);
                Ok(labels)
            }
            Err(Error::DockerResponseServerError { .. } | Error::JsonDataError { .. }) => {
                Ok(ImageLabels::Unknown)
            }
            Err(error) => Err(self.refused(&error)),
        }
    }
}
