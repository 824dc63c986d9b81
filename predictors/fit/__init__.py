"""What only training needs: tracking, reports, and everything that imports lightning or wandb."""
