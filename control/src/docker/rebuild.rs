//! The results of a rebuild: the name of the image, and the choice of the user. Pure.

use sha2::{Digest, Sha256};

use crate::model::name::hex;
use crate::model::registration::ContainerName;

/// The label with the user that was requested when the container was first created; empty if its image decides. Only
/// landfall gives a container this label, and no image may have it.
pub(super) const USER_LABEL: &str = "dev.landfall.user";

/// The longest tag that Docker accepts, in bytes.
const TAG_BYTES_MAX: usize = 128;

/// The choice of the user of a rebuilt container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserOfRebuild {
    /// The user that it has, whatever the new image specifies: the container itself requested the rebuild.
    Recorded,
    /// The user of the new image, unless the container was created with its own: the host's user requested the rebuild.
    Images,
}

/// Returns the image that landfall builds for a container: `landfall-NAME`. No other image is built or replaced for it.
///
/// The name of a repository has no upper case and no two separators in a row. A container name that violates this becomes
/// the tag of a similar repository name, so that two containers never share an image.
pub fn own_image(name: &ContainerName) -> String {
    let name = name.as_str();
    let words = name.split(|letter: char| !letter.is_ascii_alphanumeric());
    let fits =
        words.clone().all(|word| !word.is_empty()) && !name.bytes().any(|byte| byte.is_ascii_uppercase());
    if fits {
        return format!("landfall-{name}");
    }
    let like: Vec<String> = words.filter(|word| !word.is_empty()).map(str::to_ascii_lowercase).collect();
    let tag = match name.len() <= TAG_BYTES_MAX {
        true => name.to_owned(),
        false => hex(&Sha256::digest(name)),
    };
    format!("landfall-{}:{tag}", like.join("-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_container_has_its_own_image() {
        let image = |name: &str| own_image(&ContainerName::new(name).unwrap());
        assert_eq!(image("shop"), "landfall-shop");
        assert_eq!(image("my-shop_2.x"), "landfall-my-shop_2.x");
        assert_eq!(image("Shop"), "landfall-shop:Shop");
        assert_eq!(image("SHOP"), "landfall-shop:SHOP");
        assert_eq!(image("a..b"), "landfall-a-b:a..b");
        assert_eq!(image("a-"), "landfall-a:a-");
        let (long, other) = (image(&"A".repeat(200)), image(&format!("{}B", "A".repeat(199))));
        assert_ne!(long, other);
        assert!(long.rsplit_once(':').unwrap().1.len() <= TAG_BYTES_MAX);
    }
}
