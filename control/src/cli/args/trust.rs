//! The arguments of `landfall trust`.

use std::path::PathBuf;

use clap::Args;

pub(super) const TRUST_NOTES: &str = "\
A container can often write to its folder, and a cloned folder holds other people's text. So
landfall.toml runs no command and devcontainer.json opens no port below 1024 before you have
approved exactly that content. `trust` prints what the files ask for and asks once. The approval
is kept in trust.json in landfall's home, never in the folder. A changed file is a new file.

Example: landfall trust ~/shop";

/// `landfall trust`
#[derive(Debug, Args)]
pub struct TrustArgs {
    /// The folder [default: this one]
    #[arg(value_name = "DIR", conflicts_with = "list")]
    pub folder: Option<PathBuf>,
    /// Print what the files ask for and whether they are approved, and change nothing
    #[arg(long, conflicts_with_all = ["revoke", "list", "yes"])]
    pub show: bool,
    /// Withdraw the approval; commands of the folder that run are killed
    #[arg(long, conflicts_with_all = ["list", "yes"])]
    pub revoke: bool,
    /// Approve without a question, for scripts
    #[arg(long, conflicts_with = "list")]
    pub yes: bool,
    /// List every approval
    #[arg(long)]
    pub list: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}
