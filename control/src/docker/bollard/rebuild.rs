//! Replaces a container by one of an image that is built from its folder.

use std::io::Read as _;

use bollard::query_parameters::{DownloadFromContainerOptionsBuilder, RemoveImageOptions};
use futures_util::StreamExt;

use super::models::{ContainerInspectResponse, ImageConfig, ImageInspect};
use super::user::{self, Accounts, User};
use super::{Context, CreateContainerOptionsBuilder, DockerError, Engine, Error, NetworkConnectRequest};
use super::{recipe, replace};
use crate::docker::labels::{ContainerLabels, ImageLabels};
use crate::docker::rebuild::{UserOfRebuild, own_image};
use crate::model::registration::ContainerName;

/// The maximum size of an archive with one of the container's account files, in bytes.
const ACCOUNTS_BYTES_MAX: usize = 1024 * 1024;

impl Engine {
    /// Builds an image from the folder, and replaces the container by one of that image.
    pub(in crate::docker) async fn rebuild(
        &self,
        name: &ContainerName,
        context: Context,
        whose: UserOfRebuild,
    ) -> Result<(), DockerError> {
        let image = own_image(name);
        if context.starts_from(&image) {
            let why =
                format!("the Dockerfile starts from {image}, which is also the name of the image to build");
            return Err(DockerError::Refused(why));
        }
        let name = name.as_str();
        replace::recover(self, name).await?;
        let inspected =
            self.inspect(name).await?.ok_or_else(|| DockerError::NoSuchContainer(name.to_owned()))?;
        // Without the old image, the whole configuration counts as the container's own, but none of its labels.
        let old = self.image(inspected.image.as_deref().unwrap_or_default()).await?;
        let old = old.and_then(|old| old.config);
        let image_labels = match &old {
            Some(old) => ImageLabels::of(old.labels.clone().unwrap_or_default()),
            None => ImageLabels::Unknown,
        };
        let old = old.unwrap_or_default();
        let labels = inspected.config.as_ref().and_then(|config| config.labels.clone()).unwrap_or_default();
        let labels = ContainerLabels::new(labels.into_iter().collect(), image_labels);
        let user = self.user(name, &inspected, &old, &labels, whose).await?;
        let before = self.image(&image).await?.and_then(|before| before.id);
        self.build(context, &image).await?;
        let replaced = async {
            let new = self.image(&image).await?.and_then(|new| new.config).unwrap_or_default();
            user::check_image_labels(new.labels, &labels, whose)?;
            let recipe = recipe::recipe(inspected, &old, &image, user);
            replace::replace(self, name, async |name: &str| self.create(name, recipe).await).await
        };
        let replaced = replaced.await;
        if replaced.is_err() {
            // The old container is in use again, so restore the name of its image. If this fails, only a name is wrong.
            let _ = match before {
                Some(before) => self.tag(&before, &image).await,
                None => self.untag(&image).await,
            };
        }
        replaced
    }

    /// Determines the user of the new container.
    async fn user(
        &self,
        name: &str,
        inspected: &ContainerInspectResponse,
        old: &ImageConfig,
        labels: &ContainerLabels,
        whose: UserOfRebuild,
    ) -> Result<User, DockerError> {
        let config = inspected.config.clone().unwrap_or_default();
        let requested = user::requested_user(labels, &config, old);
        if whose == UserOfRebuild::Images {
            return Ok(User { user: requested.clone(), requested, groups: None });
        }
        let current = config.user.unwrap_or_default();
        let groups =
            inspected.host_config.as_ref().and_then(|host| host.group_add.clone()).unwrap_or_default();
        let accounts = match user::needs_accounts(&current, &groups) {
            true => self.accounts(name).await?,
            false => Accounts::default(),
        };
        let (user, groups) = user::pin(&current, &groups, &accounts)?;
        Ok(User { user: Some(user), requested, groups: Some(groups) })
    }

    /// Reads the users and groups of the container.
    async fn accounts(&self, name: &str) -> Result<Accounts, DockerError> {
        let passwd = self.text_in(name, "/etc/passwd").await?;
        let group = self.text_in(name, "/etc/group").await?;
        Ok(Accounts { passwd, group })
    }

    /// Returns the text of a small file in the container, running or not; empty if the file does not exist.
    async fn text_in(&self, name: &str, path: &str) -> Result<String, DockerError> {
        let unusable = |why: &dyn std::fmt::Display| {
            DockerError::Refused(format!("{path} of the container cannot be read: {why}"))
        };
        let options = DownloadFromContainerOptionsBuilder::default().path(path).build();
        let mut chunks = Box::pin(self.client.download_from_container(name, Some(options)));
        let mut bytes = Vec::new();
        while let Some(chunk) = chunks.next().await {
            match chunk {
                Ok(chunk) => bytes.extend_from_slice(&chunk),
                Err(Error::DockerResponseServerError { status_code: 404, .. }) => return Ok(String::new()),
                Err(error) => return Err(self.refused(&error)),
            }
            if bytes.len() > ACCOUNTS_BYTES_MAX {
                return Err(unusable(&"it is too long"));
            }
        }
        let mut archive = tar::Archive::new(&bytes[..]);
        let entry = archive.entries().and_then(|mut entries| entries.next().transpose());
        let mut entry =
            entry.map_err(|error| unusable(&error))?.ok_or_else(|| unusable(&"the engine sent no file"))?;
        if !entry.header().entry_type().is_file() {
            return Err(unusable(&"it is not a regular file"));
        }
        let mut content = Vec::new();
        entry.read_to_end(&mut content).map_err(|error| unusable(&error))?;
        Ok(String::from_utf8_lossy(&content).into_owned())
    }

    /// Inspects an image by its name or id, if the engine has it.
    async fn image(&self, image: &str) -> Result<Option<ImageInspect>, DockerError> {
        // Podman describes a container without an image.
        if image.is_empty() {
            return Ok(None);
        }
        match self.client.inspect_image(image).await {
            Ok(found) => Ok(Some(found)),
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(None),
            Err(error) => Err(self.refused(&error)),
        }
    }

    /// Removes a name from an image, and the image if it is not used otherwise.
    async fn untag(&self, image: &str) -> Result<(), DockerError> {
        let removed = self.client.remove_image(image, None::<RemoveImageOptions>, None).await;
        removed.map(drop).map_err(|error| self.refused(&error))
    }

    async fn create(&self, name: &str, recipe: recipe::Recipe) -> Result<(), DockerError> {
        let options = CreateContainerOptionsBuilder::default().name(name).build();
        let created = self.client.create_container(Some(options), recipe.body).await;
        created.map_err(|error| self.refused(&error))?;
        for (network, endpoint) in recipe.networks {
            let request =
                NetworkConnectRequest { container: name.to_owned(), endpoint_config: Some(endpoint) };
            let connected = self.client.connect_network(&network, request).await;
            connected.map_err(|error| self.refused(&error))?;
        }
        Ok(())
    }
}
